package endpoint

// Device is the part of a device that tunnels write to, such as a tun.Device.
type Device interface {
	// Write writes the packets bufs[i][offset:] and returns the number of
	// packets written.
	Write(bufs [][]byte, offset int) (int, error)

	// BatchSize returns the number of packets that one Write should have.
	BatchSize() int
}

// Device returns a device that writes to the device of the current Endpoint, so
// that a tunnel can use it while devices are replaced. It must not be used
// before Start.
func (s *Supervisor[E]) Device() Device { return currentDevice[E]{s} }

type currentDevice[E Endpoint] struct{ s *Supervisor[E] }

func (d currentDevice[E]) Write(bufs [][]byte, offset int) (int, error) {
	return d.s.Current().Device().Write(bufs, offset)
}

func (d currentDevice[E]) BatchSize() int { return d.s.Current().Device().BatchSize() }
