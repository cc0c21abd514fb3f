-- Which images did the daemons pull, from where and for whom?
-- One row for each pull that succeeded: a failed one leaves no event (see failed_pulls).
-- logged_in is true where the same job had called docker login before. Its registry is not
-- recorded, so that a login elsewhere counts too: pulls without one are a lower bound of
-- those that Docker Hub counts for the address.
WITH pull AS (
  SELECT *
  FROM tallyman.records
  WHERE ts >= @from AND ts < @to AND kind = 'event' AND event.type = 'image' AND event.action = 'pull'
  QUALIFY ROW_NUMBER() OVER (PARTITION BY id ORDER BY ts) = 1
),
login AS (
  SELECT @job_key(ci) AS job_key, MIN(ts) AS ts
  FROM tallyman.records
  WHERE ts >= TIMESTAMP_SUB(@from, INTERVAL 1 DAY) AND ts < @to AND kind = 'invocation' AND invocation.command = 'login'
  GROUP BY 1
)
SELECT
  p.id AS id,
  p.ts AS ts,
  @hour(p.ts) AS hour,
  COALESCE(p.repository, '') AS repository,
  COALESCE(p.workflow, '') AS workflow,
  COALESCE(p.ci.job, '') AS job,
  COALESCE(p.ci.actor, '') AS actor,
  COALESCE(p.ci.run_id, '') AS run_id,
  @job_key(p.ci) AS job_key,
  COALESCE(p.`by`, 'none') AS found_by,
  COALESCE(p.host.node, p.host.name, '') AS node,
  @image(p.event.image) AS image,
  @registry(p.event.image) AS registry,
  COALESCE(l.ts <= p.ts, FALSE) AS logged_in
FROM pull AS p
LEFT JOIN login AS l ON l.job_key = @job_key(p.ci)
WHERE NOT COALESCE(p.outside_job, FALSE)
