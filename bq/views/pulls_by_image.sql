-- Which images are pulled, from which registry, how often and by whom?
SELECT
  @day(ts) AS day, image, registry,
  COUNT(*) AS pulls,
  COUNT(DISTINCT repository) AS repositories,
  COUNT(DISTINCT job_key) AS jobs,
  COUNT(DISTINCT node) AS nodes
FROM tallyman.pulls
GROUP BY 1, 2, 3
