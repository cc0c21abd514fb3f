-- Which jobs ran, and did hooks record their start and end?
-- One row for each job that any record names. A job without a recorded start is known by
-- its calls alone: its hooks did not run, or their record was lost.
WITH named AS (
  SELECT ts, id, kind, `by` AS found_by, ci, host, job, @job_key(ci) AS job_key
  FROM tallyman.records
  WHERE ts >= TIMESTAMP_SUB(@from, INTERVAL 1 DAY) AND ts < TIMESTAMP_ADD(@to, INTERVAL 1 DAY) AND ci.run_id <> ''
    AND kind IN ('invocation', 'event', 'job.start', 'job.end')
  QUALIFY ROW_NUMBER() OVER (PARTITION BY id ORDER BY ts) = 1
)
SELECT
  job_key,
  MIN(ts) AS ts,
  @hour(MIN(ts)) AS hour,
  COALESCE(MIN(ci.repository), '') AS repository,
  COALESCE(MIN(ci.workflow), '') AS workflow,
  COALESCE(MIN(ci.job), '') AS job,
  COALESCE(MIN(ci.actor), '') AS actor,
  MIN(ci.run_id) AS run_id,
  COALESCE(MAX(ci.job_url), '') AS job_url,
  COALESCE(MIN(host.node), MIN(host.name), '') AS node,
  COUNTIF(kind = 'job.start') > 0 AS started,
  COUNTIF(kind = 'job.end') > 0 AS ended,
  COALESCE(MAX(job.outcome), '') AS outcome,
  MAX(CASE WHEN kind = 'job.end' THEN job.duration_ns END) AS duration_ns,
  COALESCE(MAX(job.version), '') AS version
FROM named AS n
GROUP BY job_key
HAVING MIN(n.ts) >= @from AND MIN(n.ts) < @to
