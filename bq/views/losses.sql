-- What is missing from the account, since when and why?
-- lost is empty where nobody can know how many records the hole took.
SELECT
  id,
  ts,
  @hour(ts) AS hour,
  COALESCE(loss.cause, '') AS cause,
  COALESCE(loss.source, '') AS source,
  CASE WHEN loss.`count` >= 0 THEN loss.`count` END AS lost,
  loss.`from` AS since,
  loss.`to` AS until,
  COALESCE(loss.detail, '') AS detail,
  COALESCE(host.node, host.name, '') AS node
FROM tallyman.records
WHERE ts >= @from AND ts < @to AND kind = 'loss'
QUALIFY ROW_NUMBER() OVER (PARTITION BY id ORDER BY ts) = 1
