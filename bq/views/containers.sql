-- Which containers were created, started and ended, for whom and how?
-- One row for each of these three events. outcome is that of an end: a container that was
-- told to stop and did is stopped, not failed (a job's services end so each time).
WITH happened AS (
  SELECT *
  FROM tallyman.records
  WHERE ts >= @from AND ts < @to AND kind = 'event' AND event.type = 'container' AND event.action IN ('create', 'start', 'die')
  QUALIFY ROW_NUMBER() OVER (PARTITION BY id ORDER BY ts) = 1
),
told AS (
  SELECT event.actor_id AS container_id, MIN(ts) AS ts
  FROM tallyman.records
  WHERE ts >= TIMESTAMP_SUB(@from, INTERVAL 1 DAY) AND ts < @to AND kind = 'event' AND event.type = 'container'
    AND event.action = 'kill' AND event.`signal` IN (2, 3, 9, 15, 28)
  GROUP BY 1
)
SELECT
  h.id AS id,
  h.ts AS ts,
  @hour(h.ts) AS hour,
  COALESCE(h.repository, '') AS repository,
  COALESCE(h.workflow, '') AS workflow,
  COALESCE(h.ci.job, '') AS job,
  COALESCE(h.ci.run_id, '') AS run_id,
  @job_key(h.ci) AS job_key,
  COALESCE(h.ci.job_url, '') AS job_url,
  COALESCE(h.`by`, 'none') AS found_by,
  COALESCE(h.host.node, h.host.name, '') AS node,
  h.event.actor_id AS container_id,
  @image(h.event.image) AS image,
  h.event.action AS action,
  COALESCE(h.event.runner_made, FALSE) AS runner_made,
  CASE
    WHEN h.event.action <> 'die' THEN ''
    WHEN COALESCE(t.ts <= h.ts, FALSE) AND NOT COALESCE(h.event.oom, FALSE) THEN 'stopped'
    WHEN COALESCE(h.event.oom, FALSE) OR COALESCE(h.event.exit_code, 0) <> 0 THEN 'failed'
    ELSE 'ok'
  END AS outcome,
  h.event.exit_code AS exit_code,
  COALESCE(h.event.oom, FALSE) AS oom,
  h.event.duration_ns AS duration_ns
FROM happened AS h
LEFT JOIN told AS t ON t.container_id = h.event.actor_id AND h.event.action = 'die'
WHERE NOT COALESCE(h.outside_job, FALSE)
