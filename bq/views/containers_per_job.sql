-- How many containers does a job start, and how do they end?
SELECT
  MIN(ts) AS ts, repository, workflow, job, job_key,
  COUNTIF(action = 'create') AS created,
  COUNTIF(action = 'start') AS started,
  COUNTIF(action = 'die' AND outcome = 'failed') AS failed,
  COUNTIF(action = 'die' AND oom) AS oom,
  COUNT(DISTINCT image) AS images,
  COALESCE(SUM(duration_ns), 0) AS time_ns
FROM tallyman.containers
WHERE job_key IS NOT NULL
GROUP BY repository, workflow, job, job_key
