-- What did servers see of the fleet?
-- One row for each imported request, or for each hour of alike ones. git_version is that of
-- the git that asked; proactive says that its User-Agent bears the mark of a golden image.
SELECT
  id,
  ts,
  @hour(ts) AS hour,
  COALESCE(http.source, '') AS source,
  COALESCE(http.`count`, 1) AS requests,
  COALESCE(http.host, '') AS host,
  COALESCE(http.class, '') AS class,
  COALESCE(http.repository, '') AS asked,
  http.status AS status,
  COALESCE(http.user_agent, '') AS user_agent,
  COALESCE(REGEXP_EXTRACT(http.user_agent, r'^git/([0-9]+\.[0-9]+)'), '') AS git_version,
  COALESCE(REGEXP_CONTAINS(http.user_agent, r'(^|[ +;(])proactive([ +;)/]|$)'), FALSE) AS proactive,
  COALESCE(http.remote_addr, '') AS remote_addr,
  COALESCE(http.anonymous, FALSE) AS anonymous,
  COALESCE(http.image, '') AS image,
  COALESCE(http.pulls, 0) AS pulls,
  COALESCE(repository, '') AS repository,
  COALESCE(workflow, '') AS workflow,
  COALESCE(ci.job, '') AS job
FROM tallyman.records
WHERE ts >= @from AND ts < @to AND kind = 'http'
QUALIFY ROW_NUMBER() OVER (PARTITION BY id ORDER BY ts) = 1
