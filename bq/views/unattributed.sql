-- What share of the traffic names no job?
SELECT
  @day(ts) AS day, basis,
  COUNT(*) AS total,
  COUNTIF(repository = '') AS unattributed,
  COUNTIF(repository = '') / COUNT(*) AS share
FROM (
  SELECT ts, 'calls' AS basis, repository FROM tallyman.calls
  UNION ALL
  SELECT ts, 'pulls', repository FROM tallyman.pulls
  UNION ALL
  SELECT ts, 'containers', repository FROM tallyman.containers WHERE action = 'start'
)
GROUP BY 1, 2
