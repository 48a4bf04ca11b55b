//go:build !quicpatch

package client

import "context"

// migrate returns errCannotMigrate: quic-go without our patches has no more
// connection IDs after a few migrations.
func (d *dialed) migrate(context.Context, *dialer) error { return errCannotMigrate }
