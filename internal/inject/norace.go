//go:build !race

package inject

const underRace = false
