module github.com/tallyman-ci/tallyman/bq/analyse

go 1.26.0

require (
	github.com/goccy/go-googlesql v0.4.0
	github.com/tallyman-ci/tallyman v0.0.0-00010101000000-000000000000
)

require github.com/goccy/googlesqlwasm2go v0.2.0 // indirect

replace github.com/tallyman-ci/tallyman => ../..
