-- What share of the daemon's events does a recorded call explain?
-- The rest went past the shim: another docker, the socket itself, a build's inner traffic.
SELECT
  @day(ts) AS day, node, type, action,
  COUNT(*) AS events,
  COUNTIF(explained) AS explained,
  COUNTIF(explained) / COUNT(*) AS share
FROM tallyman.explained
GROUP BY 1, 2, 3, 4
