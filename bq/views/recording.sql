-- How far can the other answers be trusted?
-- jobs are those that any record names, recorded those whose start the hook recorded; how
-- contexts were found is counted in calls. lost counts records, holes those of unknown size.
SELECT
  day,
  SUM(jobs) AS jobs,
  SUM(recorded) AS recorded,
  SUM(calls) AS calls,
  SUM(sealed) AS sealed,
  SUM(environment) AS environment,
  SUM(inferred) AS inferred,
  SUM(unattributed) AS unattributed,
  SUM(lost) AS lost,
  SUM(holes) AS holes
FROM (
  SELECT @day(ts) AS day, COUNT(*) AS jobs, COUNTIF(started) AS recorded, 0 AS calls, 0 AS sealed, 0 AS environment, 0 AS inferred,
    0 AS unattributed, 0 AS lost, 0 AS holes
  FROM tallyman.jobs GROUP BY 1
  UNION ALL
  SELECT @day(ts), 0, 0, COUNT(*), COUNTIF(found_by = 'sealed'), COUNTIF(found_by = 'environment'), COUNTIF(found_by = 'inferred'),
    COUNTIF(found_by NOT IN ('sealed', 'environment', 'inferred')), 0, 0
  FROM tallyman.calls GROUP BY 1
  UNION ALL
  SELECT @day(ts), 0, 0, 0, 0, 0, 0, 0, COALESCE(SUM(lost), 0), COUNTIF(lost IS NULL)
  FROM tallyman.losses GROUP BY 1
)
GROUP BY 1
