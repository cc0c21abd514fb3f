-- What did each call of docker do, for whom, for how long and with what result?
-- One row for each call that a job made itself: calls of plugins and of the runner before
-- a job are left out. outcome is unknown where nobody saw the end.
WITH call AS (
  SELECT *
  FROM tallyman.records
  WHERE ts >= @from AND ts < @to AND kind = 'invocation'
  QUALIFY ROW_NUMBER() OVER (PARTITION BY id ORDER BY ts) = 1
),
ending AS (
  SELECT ts, `end` AS e
  FROM tallyman.records
  WHERE ts >= @from AND kind = 'invocation.end' AND `end`.source <> 'unknown'
  QUALIFY ROW_NUMBER() OVER (PARTITION BY `end`.invocation_id ORDER BY ts, id) = 1
)
SELECT
  c.id AS id,
  c.ts AS ts,
  @hour(c.ts) AS hour,
  COALESCE(c.repository, '') AS repository,
  COALESCE(c.workflow, '') AS workflow,
  COALESCE(c.ci.job, '') AS job,
  COALESCE(c.ci.actor, '') AS actor,
  COALESCE(c.ci.run_id, '') AS run_id,
  @job_key(c.ci) AS job_key,
  COALESCE(c.ci.job_url, '') AS job_url,
  COALESCE(c.ci.step, '') AS step,
  COALESCE(c.`by`, 'none') AS found_by,
  COALESCE(c.host.node, c.host.name, '') AS node,
  COALESCE(c.host.name, '') AS host,
  COALESCE(c.invocation.tool, '') AS tool,
  COALESCE(c.invocation.command, '') AS command,
  COALESCE(c.invocation.images, []) AS images,
  CASE
    WHEN COALESCE(c.invocation.exec_error, '') <> '' OR COALESCE(d.e.`signal`, 0) <> 0 OR COALESCE(d.e.exit_code, 0) <> 0 THEN 'failed'
    WHEN d.e.exit_code = 0 THEN 'ok'
    ELSE 'unknown'
  END AS outcome,
  d.e.exit_code AS exit_code,
  d.e.`signal` AS `signal`,
  d.e.duration_ns AS duration_ns
FROM call AS c
LEFT JOIN ending AS d ON d.e.invocation_id = c.id
WHERE NOT COALESCE(c.invocation.nested, FALSE) AND NOT COALESCE(c.outside_job, FALSE)
