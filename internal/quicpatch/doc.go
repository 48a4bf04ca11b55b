// Package quicpatch holds the changes to quic-go: patches/*.patch, which are
// applied in order, and files/, which are added to the result. The package has
// no Go code; apply.sh makes the patched copy, and `make` calls it.
// docs/quic-go.md lists the reason and the benefit of each patch, and describes
// how to move to another version of quic-go.
//
// Code that uses the changes has the build tag quicpatch. Only make sets the
// tag, together with -modfile=.build/go.mod. Plain go commands always build
// with the stock quic-go.
package quicpatch
