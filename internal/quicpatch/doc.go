// Package quicpatch holds the changes that `make` applies to a copy of quic-go:
// patches/*.patch, applied in order, and files/, added afterwards. It has no Go
// code of its own; apply.sh does the work. docs/quic-go.md says why there are
// changes, what each is worth, and how to move to another version of quic-go.
//
// Code that needs the changes is built with the tag quicpatch, which only make
// sets, together with -modfile=.build/go.mod. Plain go commands always build
// with the stock quic-go.
package quicpatch
