-- Which workflows weigh most on docker, for each of their runs?
WITH used AS (
  SELECT day, repository, workflow, SUM(calls) AS calls, SUM(pulls) AS pulls, SUM(containers) AS containers, SUM(time_ns) AS time_ns
  FROM (
    SELECT @day(ts) AS day, repository, workflow, COUNT(*) AS calls, 0 AS pulls, 0 AS containers, COALESCE(SUM(duration_ns), 0) AS time_ns
    FROM tallyman.calls GROUP BY 1, 2, 3
    UNION ALL
    SELECT @day(ts), repository, workflow, 0, COUNT(*), 0, 0 FROM tallyman.pulls GROUP BY 1, 2, 3
    UNION ALL
    SELECT @day(ts), repository, workflow, 0, 0, COUNT(*), 0 FROM tallyman.containers WHERE action = 'start' GROUP BY 1, 2, 3
  )
  WHERE repository <> ''
  GROUP BY 1, 2, 3
),
ran AS (
  SELECT @day(ts) AS day, repository, workflow, COUNT(DISTINCT run_id) AS runs
  FROM tallyman.jobs GROUP BY 1, 2, 3
)
SELECT
  u.day AS day, u.repository AS repository, u.workflow AS workflow, COALESCE(r.runs, 0) AS runs,
  u.calls AS calls, u.pulls AS pulls, u.containers AS containers, u.time_ns AS time_ns,
  CASE WHEN r.runs > 0 THEN u.time_ns / r.runs END AS time_ns_per_run
FROM used AS u
LEFT JOIN ran AS r ON r.day = u.day AND r.repository = u.repository AND r.workflow = u.workflow
