-- Which repository, workflow, job and actor call docker, how often and for how long?
SELECT
  @day(ts) AS day, repository, workflow, job, actor,
  COUNT(*) AS calls,
  COUNTIF(outcome = 'failed') AS failed,
  COUNT(DISTINCT NULLIF(run_id, '')) AS runs,
  COALESCE(SUM(duration_ns), 0) AS time_ns
FROM tallyman.calls
GROUP BY 1, 2, 3, 4, 5
