// Package blame ranks who caused requests that a server counted: whose docker builds
// explain them in time.
package blame
