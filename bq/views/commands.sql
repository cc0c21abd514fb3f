-- Which commands do jobs use, how often do they fail and how long do they take?
SELECT
  @day(ts) AS day, tool, command,
  COUNT(*) AS calls,
  COUNTIF(outcome = 'failed') AS failed,
  COUNTIF(outcome = 'unknown') AS unknown,
  COALESCE(SUM(duration_ns), 0) AS time_ns,
  @quantile(duration_ns, 50) AS p50_ns,
  @quantile(duration_ns, 95) AS p95_ns,
  MAX(duration_ns) AS longest_ns
FROM tallyman.calls
GROUP BY 1, 2, 3
