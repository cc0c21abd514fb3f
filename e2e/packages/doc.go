// Package packages tests the packages that are released: it builds them as a release
// does, installs them in stand-ins for a runner image, upgrades, removes and purges
// them, and looks at what is left.
package packages
