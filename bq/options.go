package bq

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// DefaultExpiration is how long a new table keeps records.
const DefaultExpiration = 90 * 24 * time.Hour

// Never is the Expiration of a table that keeps its rows for ever.
const Never time.Duration = -1

// Options say what is made where.
type Options struct {
	Project      string
	Dataset      string
	Location     string        // of a new data set, default US; one that is there must be in it, where set
	Topic        string        // default: tallyman
	DeadLetter   string        // topic and subscription; default: the subscription and -dead
	Subscription string        // default: the topic and -to-bigquery
	Expiration   time.Duration // of days of records; 0 is DefaultExpiration in new tables, and leaves others as they are
	Runners      string        // who publishes, as an IAM member; "" where not known
	Number       string        // of the project; "" where not known
}

// Complete checks o and fills in the defaults.
func (o Options) Complete() (Options, error) {
	o.Topic = cmp.Or(o.Topic, "tallyman")
	o.Subscription = cmp.Or(o.Subscription, o.Topic+"-to-bigquery")
	o.DeadLetter = cmp.Or(o.DeadLetter, o.Subscription+"-dead")
	const lower, upper, digits = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
	for _, c := range []struct {
		what, value, characters string
		min, max                int
	}{
		{"project", o.Project, lower + digits + "-:.", 3, 63},
		{"data set", o.Dataset, lower + upper + digits + "_", 1, 1024},
		{"topic", o.Topic, lower + upper + digits + "-_.~+%", 3, 255},
		{"subscription", o.Subscription, lower + upper + digits + "-_.~+%", 3, 255},
		{"dead-letter topic", o.DeadLetter, lower + upper + digits + "-_.~+%", 3, 255},
		{"location", o.Location, lower + upper + digits + "-", 0, 63},
		{"project's number", o.Number, digits, 0, 20},
	} {
		foreign := func(r rune) bool { return !strings.ContainsRune(c.characters, r) }
		switch {
		case c.value == "" && c.min > 0:
			return o, fmt.Errorf("no %s is named", c.what)
		case len(c.value) < c.min || len(c.value) > c.max || strings.ContainsFunc(c.value, foreign):
			return o, fmt.Errorf("%q cannot be the name of a %s: %d to %d of the characters %s", c.value, c.what, c.min, c.max, c.characters)
		case strings.Contains(c.what, "topic") || c.what == "subscription":
			if strings.HasPrefix(c.value, "goog") || !strings.ContainsRune(lower+upper, rune(c.value[0])) {
				return o, fmt.Errorf("%q cannot be the name of a %s: it begins with a letter, and not with goog", c.value, c.what)
			}
		}
	}
	if o.Topic == o.DeadLetter {
		return o, fmt.Errorf("%q cannot be both the topic and the dead-letter topic: what cannot be written would go round for ever", o.Topic)
	}
	if o.Subscription == o.DeadLetter {
		return o, fmt.Errorf("%q cannot be both the subscription and that of the dead letters", o.Subscription)
	}
	if o.Expiration > 0 && o.Expiration < 24*time.Hour {
		return o, fmt.Errorf("an expiration of %s is under a day, and days are what expires", o.Expiration)
	}
	kind, name, found := strings.Cut(o.Runners, ":")
	if o.Runners != "" && (!found || kind == "" || name == "" || strings.ContainsAny(o.Runners, " '\"\\$`\n")) {
		return o, fmt.Errorf("%q is no IAM member: want serviceAccount:NAME@PROJECT.iam.gserviceaccount.com, principalSet://... or the like", o.Runners)
	}
	return o, nil
}

// Agent is the account by which Pub/Sub writes to BigQuery and to the dead-letter topic,
// as an IAM member. Where the project's number is not known, a shell finds it.
func (o Options) Agent() string {
	number := o.Number
	if number == "" {
		number = "$(gcloud projects describe " + o.Project + " --format='value(projectNumber)')"
	}
	return "serviceAccount:service-" + number + "@gcp-sa-pubsub.iam.gserviceaccount.com"
}

// ParseExpiration reads a number of days, as 90d, or never.
func ParseExpiration(text string) (time.Duration, error) {
	if text == "never" {
		return Never, nil
	}
	number, found := strings.CutSuffix(text, "d")
	n, err := strconv.ParseUint(number, 10, 16)
	if !found || err != nil || n == 0 {
		return 0, fmt.Errorf("%q is no number of days: use 90d, or never", text)
	}
	return time.Duration(n) * 24 * time.Hour, nil
}

// How the subscription delivers.
const (
	DeliveryAttempts = 20 // 5 to 100
	MinBackoff       = 10 * time.Second
	MaxBackoff       = 10 * time.Minute
	MessageRetention = 7 * 24 * time.Hour // the most that a subscription keeps at no extra charge for its topic
)
