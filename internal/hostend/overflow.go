package hostend

import "sync"

// Overflow counts the packets that the kernel dropped in front of one device because its queue was full.
type Overflow struct {
	mu   sync.Mutex
	seen uint64
}

// Count calls add with how many there were since the last call, if the device knows.
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
