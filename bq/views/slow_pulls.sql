-- Which images take long to pull?
-- By the duration of docker pull with one image: what docker run or a build pulls itself is
-- part of their own time.
SELECT
  @day(ts) AS day,
  image,
  registry,
  COUNT(*) AS pulls,
  @quantile(duration_ns, 50) AS p50_ns,
  @quantile(duration_ns, 95) AS p95_ns,
  MAX(duration_ns) AS longest_ns
FROM (
  SELECT c.ts, c.duration_ns, @image(ref) AS image, @registry(ref) AS registry
  FROM tallyman.calls AS c, UNNEST(c.images) AS ref
  WHERE c.outcome = 'ok' AND c.command IN ('pull', 'image pull') AND ARRAY_LENGTH(c.images) = 1 AND c.duration_ns IS NOT NULL
)
GROUP BY 1, 2, 3
