//go:build !quicpatch

package client

import "context"

// move does nothing: quic-go without our edits runs out of connection IDs after
// a few moves.
func (d *dialed) migrate(context.Context, *dialer) error { return errCannotMigrate }
