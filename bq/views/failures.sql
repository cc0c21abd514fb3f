-- Which calls fail, where and with which exit code?
SELECT
  @day(ts) AS day, repository, workflow, job, tool, command, exit_code, `signal`,
  COUNT(*) AS calls,
  MAX(ts) AS last
FROM tallyman.calls
WHERE outcome = 'failed'
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8
