-- Which team owns a repository?
-- By the rules in the table owners, as in a CODEOWNERS file: the last rule that fits counts.
-- A pattern is a repository, or the beginning of its name and an asterisk.
SELECT repository, team
FROM (
  SELECT j.repository AS repository, o.team AS team, o.line AS line
  FROM (SELECT DISTINCT repository FROM tallyman.jobs WHERE repository <> '') AS j
  JOIN tallyman.owners AS o
    ON o.pattern = j.repository
    OR (o.pattern LIKE '%*' AND STARTS_WITH(j.repository, REGEXP_REPLACE(o.pattern, r'\*$', '')))
)
WHERE TRUE
QUALIFY ROW_NUMBER() OVER (PARTITION BY repository ORDER BY line DESC) = 1
