-- Which images could not be pulled, and by which job?
-- A failed pull leaves no event of the daemon; only the call knows of it.
SELECT
  ts, hour, repository, workflow, job, run_id, job_url, node, exit_code,
  CASE WHEN ref = '' THEN '(not named)' ELSE @image(ref) END AS image,
  CASE WHEN ref = '' THEN '' ELSE @registry(ref) END AS registry
FROM (
  SELECT c.ts, c.hour, c.repository, c.workflow, c.job, c.run_id, c.job_url, c.node, c.exit_code, ref
  FROM tallyman.calls AS c, UNNEST(CASE WHEN ARRAY_LENGTH(c.images) > 0 THEN c.images ELSE [''] END) AS ref
  WHERE c.outcome = 'failed' AND c.command IN ('pull', 'image pull', 'compose pull')
)
