-- How near is each node to Docker Hub's limit for unauthenticated pulls?
-- in_window is the number of such pulls in the hour and the five hours before, used the share
-- of the 100 that Docker Hub allows an IPv4 address in six hours
-- (https://docs.docker.com/docker-hub/usage/). Nodes behind one NAT address share its limit:
-- add them up.
WITH hourly AS (
  SELECT node, hour, COUNT(*) AS pulls
  FROM tallyman.pulls
  WHERE registry = 'docker.io' AND NOT logged_in
  GROUP BY 1, 2
),
summed AS (
  SELECT h.node AS node, h.hour AS hour, MIN(h.pulls) AS pulls, SUM(w.pulls) AS in_window
  FROM hourly AS h
  JOIN hourly AS w ON w.node = h.node AND w.hour <= h.hour AND w.hour > TIMESTAMP_SUB(h.hour, INTERVAL 6 HOUR)
  GROUP BY 1, 2
)
SELECT node, hour, pulls, in_window, in_window / 100 AS used
FROM summed
