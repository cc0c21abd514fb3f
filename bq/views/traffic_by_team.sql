-- Which team's repositories call docker, how often and for how long?
SELECT
  t.day AS day,
  COALESCE(o.team, '(no owner)') AS team,
  COUNT(DISTINCT t.repository) AS repositories,
  SUM(t.calls) AS calls,
  SUM(t.failed) AS failed,
  SUM(t.time_ns) AS time_ns
FROM tallyman.traffic AS t
LEFT JOIN tallyman.teams AS o ON o.repository = t.repository
GROUP BY 1, 2
