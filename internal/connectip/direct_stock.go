//go:build !quicpatch

package connectip

// ready cannot tell: all packets go by way of a queue.
func (d *datagrams) ready() bool { return false }

// isDirect reports that direct does nothing: all datagrams come by way of the stream.
func (d *datagrams) isDirect() bool { return false }

func (d *datagrams) direct(*inbox) (stop func()) { return func() {} }
