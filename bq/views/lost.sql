-- How much is missing from the account, by cause and by who lost it?
SELECT
  @day(ts) AS day, cause, source,
  COUNT(*) AS holes,
  COALESCE(SUM(lost), 0) AS lost,
  COUNTIF(lost IS NULL) AS unknown
FROM tallyman.losses
GROUP BY 1, 2, 3
