//go:build race

package inject

const underRace = true
