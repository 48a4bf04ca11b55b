package endpoint

import "sync"

// Overflow counts the packets that the kernel dropped because the queue in
// front of a device was full. The zero value is ready to use.
type Overflow struct {
	mu   sync.Mutex // guards seen
	seen uint64     // packets already counted
}

// Count calls add with the number of packets dropped since the previous call.
// It does nothing if the device does not have the method Overflows of
// tun.Device.
func (o *Overflow) Count(device any, add func(packets int)) {
	d, ok := device.(interface{ Overflows() uint64 })
	if !ok {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := d.Overflows(); n > o.seen {
		add(int(n - o.seen))
		o.seen = n
	}
}
