package flowqueue

import (
	"errors"
	"os"

	"masquevpn/tun"
)

// Device is the source of packets for tunnels, such as a tun.Device.
type Device interface {
	// BatchSize returns the number of buffers to give Read.
	BatchSize() int

	// Read reads one packet into each bufs[i][offset:] and its length into
	// sizes[i]. It returns the number of packets.
	Read(bufs [][]byte, sizes []int, offset int) (int, error)
}

// ReadFrom reads packets from d and calls take with each batch. take sets the
// entries of packets it keeps to nil; ReadFrom uses the others again for the
// next batch. ReadFrom returns nil when d is closed, and otherwise the error of
// d.
func ReadFrom(d Device, take func([]*Packet)) error {
	n := d.BatchSize()
	packets, bufs, sizes := make([]*Packet, n), make([][]byte, n), make([]int, n)
	for {
		for i := range packets {
			if packets[i] == nil {
				packets[i] = Get()
				bufs[i] = packets[i].Buffer()
			}
		}
		count, err := d.Read(bufs, sizes, tun.Headroom)
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
