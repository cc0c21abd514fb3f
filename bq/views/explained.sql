-- Which of the daemon's events does a recorded call explain?
-- One row for each pull, creation and start that the daemon reported. A call explains what
-- happened on its host while it ran, give or take two seconds for clocks; a call whose end
-- nobody saw explains an hour. What none explains went past the shim.
WITH happened AS (
  SELECT id, ts, repository, workflow, ci, `by` AS found_by, host, event
  FROM tallyman.records
  WHERE ts >= @from AND ts < @to AND kind = 'event' AND NOT COALESCE(outside_job, FALSE)
    AND ((event.type = 'image' AND event.action = 'pull') OR (event.type = 'container' AND event.action IN ('create', 'start')))
  QUALIFY ROW_NUMBER() OVER (PARTITION BY id ORDER BY ts) = 1
),
-- Calls and events of a host in one row, in the order of time: an event is explained where
-- the latest end of all calls before it is not before it. A join of all calls with all
-- events of a host would grow with their product.
moments AS (
  SELECT '' AS id, host, TIMESTAMP_SUB(ts, INTERVAL 2 SECOND) AS ts,
    TIMESTAMP_ADD(ts, INTERVAL (@div(duration_ns, 1000) + 2000000) MICROSECOND) AS until
  FROM (
    SELECT host, ts, COALESCE(duration_ns, 3600000000000) AS duration_ns
    FROM tallyman.calls
    WHERE ts >= TIMESTAMP_SUB(@from, INTERVAL 1 DAY) AND ts < TIMESTAMP_ADD(@to, INTERVAL 1 DAY)
  )
  UNION ALL
  SELECT id, COALESCE(host.name, ''), ts, NULL
  FROM happened
),
reached AS (
  SELECT id, ts, MAX(until) OVER (PARTITION BY host ORDER BY ts RANGE BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS until
  FROM moments
),
reason AS (
  SELECT id
  FROM reached
  WHERE id <> '' AND until >= ts
)
SELECT
  h.id AS id,
  h.ts AS ts,
  @hour(h.ts) AS hour,
  COALESCE(h.repository, '') AS repository,
  COALESCE(h.workflow, '') AS workflow,
  COALESCE(h.ci.job, '') AS job,
  COALESCE(h.found_by, 'none') AS found_by,
  COALESCE(h.host.node, h.host.name, '') AS node,
  h.event.type AS type,
  h.event.action AS action,
  COALESCE(h.event.runner_made, FALSE) AS runner_made,
  r.id IS NOT NULL OR COALESCE(h.event.runner_made, FALSE) AS explained
FROM happened AS h
LEFT JOIN reason AS r ON r.id = h.id
