//go:build !quicpatch

package connectip

// direct does nothing: all datagrams come by way of the stream.
func (d *datagrams) direct(*inbox) (stop func()) { return func() {} }
