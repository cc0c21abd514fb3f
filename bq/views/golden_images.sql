-- Do builds use golden images, and does it help?
-- By the User-Agent of imported git requests. suspect marks a git that bears the mark of a
-- golden image and is older than 2.46, the first that knows http.proactiveAuth: it only says
-- that it authenticates (https://git-scm.com/docs/git-config).
SELECT
  day, git_version, proactive,
  SUM(requests) AS requests,
  SUM(refused) AS refused,
  SUM(refused) / SUM(requests) AS refused_share,
  proactive AND CAST(major AS INT64) * 1000 + CAST(minor AS INT64) < 2046 AS suspect
FROM (
  SELECT @day(ts) AS day, git_version, proactive, requests, CASE WHEN status = 401 THEN requests ELSE 0 END AS refused,
    REGEXP_EXTRACT(git_version, r'^([0-9]{1,6})') AS major, REGEXP_EXTRACT(git_version, r'\.([0-9]{1,6})') AS minor
  FROM tallyman.requests
  WHERE git_version <> '' AND requests > 0
)
GROUP BY 1, 2, 3, major, minor
