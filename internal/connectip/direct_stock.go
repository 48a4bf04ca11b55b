//go:build !quicpatch

package connectip

// isDirect reports that direct does nothing: all datagrams come by way of the stream.
func (d *datagrams) isDirect() bool { return false }

func (d *datagrams) direct(*inbox) (stop func()) { return func() {} }
