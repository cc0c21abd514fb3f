package panels

import "slices"

// Columns that many panels share.
var (
	repository = Column{Name: "repository", Title: "repository", Unit: Text, Sets: "repository"}
	workflow   = Column{Name: "workflow", Title: "workflow", Unit: Text, Sets: "workflow"}
	job        = Column{Name: "job", Title: "job", Unit: Text}
	jobURL     = Column{Name: "job_url", Unit: URL}
	image      = Column{Name: "image", Title: "image", Unit: Text, Sets: "image"}
	calls      = Column{Name: "calls", Title: "calls", Unit: Count, Bar: true}
	failed     = Column{Name: "failed", Title: "failed", Unit: Count, Tone: Bad}
	runs       = Column{Name: "runs", Title: "runs", Unit: Count}
	busy       = Column{Name: "time_ns", Title: "time", Unit: Duration}
)

// The page's sections.
const (
	overview = "Overview"
	who      = "Who"
	images   = "Images"
	failures = "Failures and time"
	holes    = "What is missing"
	servers  = "What servers saw"
)

// Bounds asks for the time of the first and of the last record.
func Bounds() Panel {
	return Panel{ID: "bounds", Chart: Bars, SQL: `
SELECT MIN(ts) AS first, MAX(ts) AS last
FROM tallyman.records
WHERE ts >= @from AND ts < @to`, Columns: []Column{{Name: "first", Unit: Time}, {Name: "last", Unit: Time}}}
}

// Trust asks how far all other answers can be trusted.
func Trust() Panel {
	p := Panel{ID: "trust", Section: "Trust", Title: "Coverage", Question: "How much of the truth do the records hold?", Chart: Figures, SQL: `
SELECT j.jobs, j.recorded, c.sealed, c.environment, c.inferred, c.none, l.lost, l.holes
FROM (
  SELECT COUNT(*) AS jobs, COUNTIF(started) AS recorded
  FROM tallyman.jobs
  WHERE ts >= @from AND ts < @to
    AND @only(repository, workflow)
) AS j
CROSS JOIN (
  SELECT COUNTIF(found_by = 'sealed') AS sealed, COUNTIF(found_by = 'environment') AS environment,
    COUNTIF(found_by = 'inferred') AS inferred, COUNTIF(found_by = 'none') AS none
  FROM tallyman.calls
  WHERE ts >= @from AND ts < @to
    AND @only(repository, workflow, images)
) AS c
CROSS JOIN (
  SELECT COALESCE(SUM(lost), 0) AS lost, COUNTIF(lost IS NULL) AS holes
  FROM tallyman.losses
  WHERE ts >= @from AND ts < @to
) AS l`}
	for _, name := range []string{"jobs", "recorded", "sealed", "environment", "inferred", "none", "lost", "holes"} {
		p.Columns = append(p.Columns, Column{Name: name, Title: name, Unit: Count})
	}
	p.Views = Views(p.SQL)
	return p
}

// All is the list of panels, in the order of the page.
func All() []Panel {
	list := []Panel{
		{ID: "totals", Section: overview, Title: "Totals", Question: "How much was there, and how much of it went wrong?", Chart: Figures, Wide: true, SQL: `
SELECT c.calls, c.failed, c.time_ns, c.runs, p.pulls, k.containers, c.unattributed, l.lost
FROM (
  SELECT COUNT(*) AS calls, COUNTIF(outcome = 'failed') AS failed, SUM(duration_ns) AS time_ns,
    COUNT(DISTINCT NULLIF(run_id, '')) AS runs, COUNTIF(repository = '') / NULLIF(COUNT(*), 0) AS unattributed
  FROM tallyman.calls
  WHERE ts >= @from AND ts < @to
    AND @only(repository, workflow, images)
) AS c
CROSS JOIN (
  SELECT COUNT(*) AS pulls
  FROM tallyman.pulls
  WHERE ts >= @from AND ts < @to
    AND @only(repository, workflow, image)
) AS p
CROSS JOIN (
  SELECT COUNTIF(action = 'start') AS containers
  FROM tallyman.containers
  WHERE ts >= @from AND ts < @to
    AND @only(repository, workflow, image)
) AS k
CROSS JOIN (
  SELECT COALESCE(SUM(lost), 0) AS lost
  FROM tallyman.losses
  WHERE ts >= @from AND ts < @to
) AS l`,
			Columns: []Column{
				{Name: "calls", Title: "docker calls", Unit: Count},
				{Name: "failed", Title: "failed calls", Unit: Count, Tone: Bad, Note: "ended with another exit code than 0, or by a signal"},
				{Name: "time_ns", Title: "time in docker", Unit: Duration},
				{Name: "runs", Title: "workflow runs", Unit: Count},
				{Name: "pulls", Title: "images pulled", Unit: Count},
				{Name: "containers", Title: "containers started", Unit: Count},
				{Name: "unattributed", Title: "calls without a job", Unit: Share, Tone: Warn},
				{Name: "lost", Title: "records lost", Unit: Count, Tone: Bad, Note: "of the whole machine or fleet"},
			},
			Empty: "Is the shim in docker’s place on the runners? tallyman doctor tells. A wider time range or fewer filters may help too."},
		{ID: "activity", Section: overview, Kind: "invocation", Title: "Docker calls over time", Question: "When was docker called, and how often did it fail?", Chart: Activity, Wide: true, SQL: `
SELECT hour, COUNTIF(outcome = 'ok') AS ok, COUNTIF(outcome = 'unknown') AS unknown, COUNTIF(outcome = 'failed') AS failed
FROM tallyman.calls
WHERE ts >= @from AND ts < @to
  AND @only(repository, workflow, images)
GROUP BY hour
ORDER BY hour`,
			Columns: []Column{{Name: "hour", Title: "hour", Unit: Time}, {Name: "ok", Title: "ended well", Unit: Count}, {Name: "unknown", Title: "end not known", Unit: Count, Tone: Quiet}, failed}},

		{ID: "repositories", Section: who, Kind: "invocation", Title: "Repositories", Question: "Whose jobs call docker most?", Chart: Bars, SQL: `
SELECT repository, COUNT(*) AS calls, COUNTIF(outcome = 'failed') AS failed, COUNT(DISTINCT NULLIF(run_id, '')) AS runs, SUM(duration_ns) AS time_ns
FROM tallyman.calls
WHERE ts >= @from AND ts < @to
  AND @only(repository, workflow, images)
GROUP BY repository
ORDER BY calls DESC, repository
LIMIT 10`,
			Columns: []Column{repository, calls, failed, runs, busy}},
		{ID: "workflows", Section: who, Kind: "invocation", Title: "Workflows", Question: "Which workflows keep docker busy longest?", Chart: Bars, SQL: `
SELECT repository, workflow, SUM(duration_ns) AS time_ns, COUNT(*) AS calls, COUNTIF(outcome = 'failed') AS failed, COUNT(DISTINCT NULLIF(run_id, '')) AS runs
FROM tallyman.calls
WHERE ts >= @from AND ts < @to
  AND @only(repository, workflow, images)
GROUP BY repository, workflow
ORDER BY time_ns DESC, repository, workflow
LIMIT 10`,
			Columns: []Column{repository, workflow, barred(busy), plain(calls), failed, runs}},
		{ID: "jobs", Section: who, Kind: "event", Title: "Heaviest jobs", Question: "Which single jobs start most containers?", Chart: Bars, SQL: `
SELECT repository, workflow, job, MAX(job_url) AS job_url, COUNTIF(action = 'start') AS containers,
  COUNTIF(outcome = 'failed') AS failed, SUM(duration_ns) AS time_ns
FROM tallyman.containers
WHERE ts >= @from AND ts < @to
  AND job_key IS NOT NULL
  AND @only(repository, workflow, image)
GROUP BY repository, workflow, job, job_key
ORDER BY containers DESC, time_ns DESC, repository, workflow, job
LIMIT 10`, Note: "The job’s name opens its log.",
			Columns: []Column{repository, workflow, job, jobURL, {Name: "containers", Title: "containers", Unit: Count, Bar: true}, failed, {Name: "time_ns", Title: "run time", Unit: Duration}}},
		{ID: "teams", Section: who, Kind: "invocation", Title: "Teams", Question: "Whose repositories are they?", Chart: Bars, SQL: `
SELECT t.team AS team, COUNT(*) AS calls, COUNTIF(c.outcome = 'failed') AS failed, COUNT(DISTINCT c.repository) AS repositories, SUM(c.duration_ns) AS time_ns
FROM tallyman.calls AS c
JOIN tallyman.teams AS t ON t.repository = c.repository
WHERE c.ts >= @from AND c.ts < @to
  AND @only(c.repository, c.workflow, c.images)
GROUP BY t.team
ORDER BY calls DESC, team
LIMIT 10`,
			Columns: []Column{{Name: "team", Title: "team", Unit: Text}, calls, failed, {Name: "repositories", Title: "repositories", Unit: Count}, busy},
			Empty:   "No repository has an owner: the table owners says who owns what."},
		{ID: "actors", Section: who, Kind: "invocation", Title: "People and bots", Question: "Who triggered the jobs that call docker?", Chart: Bars, SQL: `
SELECT actor, COUNT(*) AS calls, COUNTIF(outcome = 'failed') AS failed, COUNT(DISTINCT NULLIF(run_id, '')) AS runs, SUM(duration_ns) AS time_ns
FROM tallyman.calls
WHERE ts >= @from AND ts < @to
  AND actor <> ''
  AND @only(repository, workflow, images)
GROUP BY actor
ORDER BY calls DESC, actor
LIMIT 10`,
			Columns: []Column{{Name: "actor", Title: "actor", Unit: Text}, calls, failed, runs, busy}},

		{ID: "pulls-over-time", Section: images, Kind: "event", Title: "Pulls over time", Question: "When are images pulled, and from where?", Chart: Activity, Wide: true, SQL: `
SELECT hour, COUNTIF(registry = 'docker.io') AS docker_hub, COUNTIF(registry = 'ghcr.io') AS ghcr, COUNTIF(registry NOT IN ('docker.io', 'ghcr.io')) AS others
FROM tallyman.pulls
WHERE ts >= @from AND ts < @to
  AND @only(repository, workflow, image)
GROUP BY hour
ORDER BY hour`,
			Columns: []Column{{Name: "hour", Title: "hour", Unit: Time}, {Name: "docker_hub", Title: "Docker Hub", Unit: Count}, {Name: "ghcr", Title: "ghcr.io", Unit: Count}, {Name: "others", Title: "other registries", Unit: Count}},
			Empty:   noPulls},
		{ID: "pulled-images", Section: images, Kind: "event", Title: "Images", Question: "Which images are pulled, and by how many repositories?", Chart: Bars, SQL: `
SELECT image, registry, COUNT(*) AS pulls, COUNT(DISTINCT NULLIF(repository, '')) AS repositories, COUNT(DISTINCT NULLIF(node, '')) AS nodes
FROM tallyman.pulls
WHERE ts >= @from AND ts < @to
  AND @only(repository, workflow, image)
GROUP BY image, registry
ORDER BY pulls DESC, image
LIMIT 10`,
			Columns: []Column{image, {Name: "registry", Title: "registry", Unit: Text}, {Name: "pulls", Title: "pulls", Unit: Count, Bar: true}, {Name: "repositories", Title: "repositories", Unit: Count}, {Name: "nodes", Title: "hosts", Unit: Count}},
			Empty:   noPulls},
		{ID: "rate-limit", Section: images, Kind: "event", Title: "Docker Hub’s limit, by host", Question: "How near did each host come to the pulls that Docker Hub allows without a login?", Chart: Bars, SQL: `
SELECT node, MAX(in_window) AS in_window, MAX(used) AS used, SUM(pulls) AS pulls
FROM tallyman.dockerhub_limit
WHERE hour >= @from AND hour < @to
GROUP BY node
ORDER BY in_window DESC, node
LIMIT 10`, Note: "A full bar is the limit: Docker Hub lets an IPv4 address pull 100 times in six hours without a login. Hosts behind one NAT share an address: add them up.",
			Columns: []Column{{Name: "node", Title: "host", Unit: Text}, {Name: "in_window", Title: "most in 6 hours", Unit: Count}, {Name: "used", Title: "of the limit", Unit: Share, Tone: Bad, ToneFrom: 0.8, Bar: true}, {Name: "pulls", Title: "in all", Unit: Count}},
			Empty:   noPulls},
		{ID: "failed-pulls", Section: images, Kind: "invocation", Title: "Failed pulls", Question: "Which images could not be pulled, and in whose jobs?", Chart: Bars, SQL: `
SELECT image, repository, workflow, job, MAX(job_url) AS job_url, COUNT(*) AS failed, MAX(exit_code) AS exit_code, MAX(ts) AS last
FROM tallyman.failed_pulls
WHERE ts >= @from AND ts < @to
  AND @only(repository, workflow, image)
GROUP BY image, repository, workflow, job
ORDER BY failed DESC, last DESC, image, repository, workflow, job
LIMIT 10`,
			Columns: []Column{image, repository, workflow, job, jobURL, barred(failed), {Name: "exit_code", Title: "exit code", Unit: Count}, {Name: "last", Title: "last (UTC)", Unit: Time}},
			Empty:   "No pull failed in this time, or none was recorded. A failed pull leaves no event of the daemon: only the shim sees it."},

		{ID: "failures", Section: failures, Kind: "invocation", Title: "Failed calls", Question: "Which commands fail, where, and with which exit code?", Chart: Bars, SQL: `
SELECT RTRIM(CONCAT(tool, ' ', command)) AS called, repository, workflow, MAX(job_url) AS job_url, COUNT(*) AS failed, exit_code, MAX(ts) AS last
FROM tallyman.calls
WHERE ts >= @from AND ts < @to
  AND outcome = 'failed'
  AND @only(repository, workflow, images)
GROUP BY tool, command, repository, workflow, exit_code
ORDER BY failed DESC, last DESC, called, repository, workflow
LIMIT 10`,
			Columns: []Column{{Name: "called", Title: "command", Unit: Text}, repository, workflow, jobURL, barred(failed), {Name: "exit_code", Title: "exit code", Unit: Count}, {Name: "last", Title: "last (UTC)", Unit: Time}},
			Empty:   "No call failed in this time, or no end was recorded. Exit codes need Linux 6.15 on the runners."},
		{ID: "durations", Section: failures, Kind: "invocation", Title: "How long commands take", Question: "Which commands do jobs wait for?", Chart: Spread, SQL: `
SELECT RTRIM(CONCAT(tool, ' ', command)) AS called, @quantile(duration_ns, 50) AS p50_ns, @quantile(duration_ns, 95) AS p95_ns, COUNT(*) AS calls, SUM(duration_ns) AS time_ns
FROM tallyman.calls
WHERE ts >= @from AND ts < @to
  AND duration_ns IS NOT NULL
  AND @only(repository, workflow, images)
GROUP BY tool, command
ORDER BY time_ns DESC, called
LIMIT 10`, Note: "The full bar is the median; the pale one is what 95 of 100 calls stay under.",
			Columns: []Column{{Name: "called", Title: "command", Unit: Text}, {Name: "p50_ns", Title: "median", Unit: Duration, Bar: true}, {Name: "p95_ns", Title: "95 %", Unit: Duration, Bar: true}, {Name: "calls", Title: "calls", Unit: Count}, {Name: "time_ns", Title: "in all", Unit: Duration}},
			Empty:   "Durations need Linux 6.5 on the runners, and an agent that was there when the command ended."},
		{ID: "container-ends", Section: failures, Kind: "event", Title: "Containers that failed", Question: "Which images’ containers end badly?", Chart: Bars, SQL: `
SELECT image, repository, COUNTIF(outcome = 'failed') AS failed, COUNTIF(oom) AS oom, COUNT(*) AS ended
FROM tallyman.containers
WHERE ts >= @from AND ts < @to
  AND action = 'die'
  AND @only(repository, workflow, image)
GROUP BY image, repository
HAVING COUNTIF(outcome = 'failed') > 0
ORDER BY failed DESC, image, repository
LIMIT 10`, Note: "A container that was told to stop did not fail.",
			Columns: []Column{image, repository, barred(failed), {Name: "oom", Title: "out of memory", Unit: Count, Tone: Bad}, {Name: "ended", Title: "of", Unit: Count}},
			Empty:   "No container ended badly in this time, or no event of the daemon was recorded."},

		{ID: "unattributed", Section: holes, Kind: "invocation", Title: "Without a job", Question: "Which calls could not be given to a job, and where were they made?", Chart: Bars, SQL: `
SELECT RTRIM(CONCAT(tool, ' ', command)) AS called, node, COUNT(*) AS calls, MAX(ts) AS last
FROM tallyman.calls
WHERE ts >= @from AND ts < @to
  AND repository = ''
  AND @only(images)
GROUP BY tool, command, node
ORDER BY calls DESC, called, node
LIMIT 10`, Note: "sudo and cleared environments hide a job; the job-started hook seals it all the same where it is installed.",
			Columns: []Column{{Name: "called", Title: "command", Unit: Text}, {Name: "node", Title: "host", Unit: Text}, warned(calls), {Name: "last", Title: "last (UTC)", Unit: Time}},
			Empty:   "Each recorded call has a job."},
		{ID: "explained", Section: holes, Kind: "event", Title: "Events that a call explains", Question: "How much of what the daemon did went past the shim?", Chart: Bars, SQL: `
SELECT CONCAT(type, ' ', action) AS event, COUNT(*) AS events, COUNTIF(explained) AS explained,
  COUNTIF(explained) / COUNT(*) AS share, COUNT(*) - COUNTIF(explained) AS past
FROM tallyman.explained
WHERE ts >= @from AND ts < @to
  AND @only(repository, workflow)
GROUP BY type, action
ORDER BY past DESC, events DESC, event
LIMIT 10`, Note: "What went past the shim: another docker, the socket itself, and what builds do inside.",
			Columns: []Column{{Name: "event", Title: "event", Unit: Text}, {Name: "events", Title: "events", Unit: Count}, {Name: "explained", Title: "explained", Unit: Count}, {Name: "share", Title: "share", Unit: Share}, {Name: "past", Title: "past the shim", Unit: Count, Tone: Warn, Bar: true}},
			Empty:   "No event of the daemon was recorded: does the agent reach it? tallyman status tells."},
		{ID: "losses", Section: holes, Kind: "loss", Title: "Lost records", Question: "What is missing from all of the above, and why?", Chart: Bars, SQL: `
SELECT cause, source, COALESCE(SUM(lost), 0) AS lost, COUNTIF(lost IS NULL) AS holes, COUNT(*) AS times, MAX(ts) AS last
FROM tallyman.losses
WHERE ts >= @from AND ts < @to
GROUP BY cause, source
ORDER BY lost DESC, holes DESC, cause, source
LIMIT 10`, Note: "A hole of unknown size is counted as one hole, not as records.",
			Columns: []Column{{Name: "cause", Title: "cause", Unit: Text}, {Name: "source", Title: "part", Unit: Text}, {Name: "lost", Title: "records", Unit: Count, Tone: Bad, Bar: true}, {Name: "holes", Title: "holes", Note: "losses of unknown size", Unit: Count, Tone: Bad}, {Name: "times", Title: "times", Unit: Count}, {Name: "last", Title: "last (UTC)", Unit: Time}},
			Empty:   "No loss was recorded. What bypasses the shim and the daemon is in no account: see the coverage below."},

		{ID: "requests", Section: servers, Kind: "http", Title: "Imported requests over time", Question: "When did servers see requests of the fleet, and how many did they refuse?", Chart: Activity, Wide: true, SQL: `
SELECT hour, SUM(CASE WHEN status = 401 THEN 0 ELSE requests END) AS others, SUM(CASE WHEN status = 401 THEN requests ELSE 0 END) AS refused
FROM tallyman.requests
WHERE ts >= @from AND ts < @to
GROUP BY hour
ORDER BY hour`,
			Columns: []Column{{Name: "hour", Title: "hour", Unit: Time}, {Name: "others", Title: "other answers", Unit: Count}, {Name: "refused", Title: "401", Unit: Count, Tone: Bad}},
			Empty:   noRequests},
		{ID: "golden-images", Section: servers, Kind: "http", Title: "Golden images, by what git says of itself", Question: "Do builds use golden images, and does it help?", Chart: Bars, SQL: `
SELECT CONCAT('git ', git_version) AS git, CASE WHEN proactive THEN 'golden image' ELSE 'other image' END AS mark,
  SUM(requests) AS requests, SUM(CASE WHEN status = 401 THEN requests ELSE 0 END) AS refused
FROM tallyman.requests
WHERE ts >= @from AND ts < @to
  AND git_version <> ''
GROUP BY git_version, proactive
ORDER BY requests DESC, git, mark
LIMIT 10`, Note: "http.proactiveAuth came with git 2.46: an older git that bears the mark only says that it authenticates.",
			Columns: []Column{{Name: "git", Title: "git", Unit: Text}, {Name: "mark", Title: "image", Unit: Text}, {Name: "requests", Title: "requests", Unit: Count, Bar: true}, {Name: "refused", Title: "401", Unit: Count, Tone: Bad}},
			Empty:   noRequests},
		{ID: "asked", Section: servers, Kind: "http", Title: "What was asked for", Question: "Which repositories and images were asked for, without a login too?", Chart: Bars, SQL: `
SELECT CASE WHEN asked = '' THEN image ELSE asked END AS target, host, SUM(requests) AS requests,
  SUM(CASE WHEN anonymous THEN requests ELSE 0 END) AS anonymous, SUM(CASE WHEN status = 401 THEN requests ELSE 0 END) AS refused
FROM tallyman.requests
WHERE ts >= @from AND ts < @to
GROUP BY CASE WHEN asked = '' THEN image ELSE asked END, host
ORDER BY requests DESC, target, host
LIMIT 10`,
			Columns: []Column{{Name: "target", Title: "asked for", Unit: Text}, {Name: "host", Title: "server", Unit: Text}, {Name: "requests", Title: "requests", Unit: Count, Bar: true}, {Name: "anonymous", Title: "anonymous", Unit: Count, Tone: Warn}, {Name: "refused", Title: "401", Unit: Count, Tone: Bad}},
			Empty:   noRequests},
	}
	for i := range list {
		list[i].Views = Views(list[i].SQL)
	}
	return list
}

const noRequests = "Import what servers counted: tallyman-desk import github-csv or dockerhub-csv makes records of it."

const noPulls = "Pulls are events of the Docker daemon: does the agent reach it? tallyman status tells. Pulls of images that are there already make no event."

// barred, plain and warned are a column with a bar, without, and in the colour of warnings.
func barred(c Column) Column { c.Bar = true; return c }
func plain(c Column) Column  { c.Bar = false; return c }
func warned(c Column) Column { c.Tone = Warn; return c }

// Of are the panels about a kind of records; all of them where it is empty.
func Of(kind string) []Panel {
	return slices.DeleteFunc(All(), func(p Panel) bool { return kind != "" && p.Kind != "" && p.Kind != kind })
}

// Kinds are the kinds that panels are about.
func Kinds() []string {
	var out []string
	for _, p := range All() {
		if p.Kind != "" && !slices.Contains(out, p.Kind) {
			out = append(out, p.Kind)
		}
	}
	slices.Sort(out)
	return out
}
