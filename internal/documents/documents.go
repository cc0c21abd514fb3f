// Package documents holds tests alone: what the documents of this repository say of the
// repository itself is so. Its links lead somewhere, the targets of make and the tests
// that it names exist, and the tables of ARCHITECTURE.md name the folders and modules
// that there are.
package documents
