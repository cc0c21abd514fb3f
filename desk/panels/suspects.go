package panels

import "context"

// Stream is a source that hands on one row after the other, for answers that are too long
// for memory.
type Stream interface {
	Source
	// Each runs one query: head gets the names of the columns, once, and row each row. An
	// error of theirs ends it and is returned.
	Each(ctx context.Context, sql string, head func(columns []string) error, row func(values []any) error, params ...Param) error
}

// Suspects are the two queries of the ranking of suspects: the git requests that were
// imported, those that named an account in one sum, and what package blame wants of
// records to know the builds. They read records and no kept answer, because a build is
// told by its flags. They are about the whole fleet: a filter on a repository would take
// the innocent's explanation away.
func Suspects() (requests, builds Panel) {
	const section = "Suspects"
	requests = Panel{ID: "suspects-requests", Section: section, Title: "Anonymous requests", Question: "Which git requests named no account?", SQL: `
SELECT anonymous, moment AS ts, user_agent, asked, addr, SUM(n) AS n
FROM (
  SELECT anonymous, CASE WHEN anonymous THEN ts END AS moment, CASE WHEN anonymous THEN user_agent END AS user_agent,
    CASE WHEN anonymous THEN asked END AS asked, CASE WHEN anonymous THEN addr END AS addr, n
  FROM (
    SELECT ts, COALESCE(r.http.user_agent, '') AS user_agent, COALESCE(r.http.repository, '') AS asked,
      COALESCE(r.http.remote_addr, '') AS addr, GREATEST(COALESCE(r.http.count, 1), 1) AS n,
      COALESCE(r.http.anonymous, FALSE) OR COALESCE(r.http.user, '') = '' AND COALESCE(r.http.token_name, '') = '' AS anonymous
    FROM tallyman.records AS r
    WHERE ts >= @from AND ts < @to AND kind = 'http' AND STARTS_WITH(r.http.class, 'git-') AND COALESCE(r.http.period_ns, 0) = 0
    QUALIFY ROW_NUMBER() OVER (PARTITION BY id ORDER BY ts) = 1
  ) AS q
) AS q
GROUP BY anonymous, moment, user_agent, asked, addr`}
	builds = Panel{ID: "suspects-builds", Section: section, Title: "Builds", Question: "When did whose builds run, and what of them is missing?", SQL: `
SELECT ts, id, kind, r.ci.repository AS repository, r.ci.workflow AS workflow, r.ci.job AS job, r.ci.step AS step,
  r.ci.run_id AS run_id, r.ci.job_url AS job_url, r.ci.run_number AS run_number, r.ci.runner.name AS runner,
  r.host.pod AS pod, r.host.name AS host, COALESCE(r.invocation.command, r.end.command) AS command,
  ARRAY_TO_STRING(r.invocation.images, ' ') AS images, ARRAY_TO_STRING(r.invocation.flags, ' ') AS flags,
  r.invocation.target AS target, r.invocation.nested AS nested, r.invocation.exec_error AS exec_error,
  r.end.invocation_id AS invocation_id, r.end.duration_ns AS duration_ns, r.end.at_most AS at_most,
  r.loss.cause AS cause, r.loss.source AS source, r.loss.count AS lost
FROM tallyman.records AS r
WHERE ts >= @from AND ts < @to
  AND (kind = 'loss'
    OR kind IN ('invocation', 'invocation.end')
      AND (r.invocation.command LIKE '%build%' OR r.invocation.command LIKE '%bake%' OR r.invocation.command LIKE 'compose %'
        OR r.end.command LIKE '%build%' OR r.end.command LIKE '%bake%' OR r.end.command LIKE 'compose %'))`}
	for _, p := range []*Panel{&requests, &builds} {
		p.Views = Views(p.SQL)
	}
	return requests, builds
}
