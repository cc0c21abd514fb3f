-- When was docker called, and how did the calls end?
SELECT
  hour,
  COUNT(*) AS calls,
  COUNTIF(outcome = 'ok') AS ok,
  COUNTIF(outcome = 'failed') AS failed,
  COUNTIF(outcome = 'unknown') AS unknown
FROM tallyman.calls
GROUP BY 1
