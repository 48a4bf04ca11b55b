package flowqueue

import (
	"errors"
	"os"
)

// Device is where packets for tunnels come from.
type Device interface {
	BatchSize() int
	// Read reads packets to buf[offset:] of each of bufs, and their lengths into sizes. It returns their number.
	Read(bufs [][]byte, sizes []int, offset int) (int, error)
}

// ReadFrom reads packets from d and calls take with those that came together, until d is closed, which gives nil, or fails. What
// take keeps of them it sets to nil; the others are overwritten by the next ones.
func ReadFrom(d Device, take func([]*Packet)) error {
	n := d.BatchSize()
	packets, bufs, sizes := make([]*Packet, n), make([][]byte, n), make([]int, n)
	for {
		for i := range packets {
			if packets[i] == nil {
				packets[i] = Get()
				bufs[i] = packets[i].Room()
			}
		}
		count, err := d.Read(bufs, sizes, Headroom)
		for i := range count {
			packets[i].Size = sizes[i]
		}
		take(packets[:count])
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
