package dashboards

import (
	"net/url"
	"strings"

	"github.com/tallyman-ci/tallyman/desk/panels"
)

// Link opens a view in Looker Studio.
type Link struct {
	Title, View, URL string
}

// Looker gives links, one for each view that panels read, that make a report in
// Looker Studio with the view as its data source. The report begins empty: reports
// cannot be kept as files, so that there is no template to begin with.
//
// The parameters are those of the Linking API
// (https://developers.google.com/looker-studio/integrate/linking-api).
func Looker(list []panels.Panel, project, dataset, billing string) []Link {
	if billing == "" {
		billing = project
	}
	var views []string
	title := map[string]string{}
	// A panel that reads only one view names it better than one that reads several.
	for _, most := range []int{1, 1 << 10} {
		for _, p := range list {
			for _, v := range p.Views {
				if _, seen := title[v]; !seen && len(p.Views) <= most {
					views = append(views, v)
					title[v] = p.Title
				}
			}
		}
	}
	var out []Link
	for _, v := range views {
		q := url.Values{"c.mode": {"edit"}, "r.reportName": {"Tallyman: " + title[v]}}
		for k, v := range map[string]string{
			"connector": "bigQuery", "type": "TABLE", "projectId": project, "datasetId": dataset, "tableId": v, "billingProjectId": billing,
			"datasourceName": "Tallyman " + strings.ReplaceAll(v, "_", " "),
		} {
			q.Set("ds.ds0."+k, v)
		}
		// A plus sign is a blank in forms only.
		out = append(out, Link{title[v], v, "https://lookerstudio.google.com/reporting/create?" + strings.ReplaceAll(q.Encode(), "+", "%20")})
	}
	return out
}
