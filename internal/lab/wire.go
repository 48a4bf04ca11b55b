package lab

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Wire is a link between two hosts that passes through this process, which can
// delay, drop and reorder packets. It carries a few hundred thousand packets
// per second. Links of [Lab.Connect] are faster.
type Wire struct {
	ab, ba  *pipe
	a, b    *os.File // the TAP devices
	readers sync.WaitGroup
	closing sync.Once
}

// WireOptions describes a wire.
type WireOptions struct {
	MTU        int        // interface MTU in bytes; 0: 1500
	Impairment Impairment // initial impairment of both directions
	// Seed determines the random decisions: they repeat with the same seed and
	// packets.
	Seed uint64
}

// Wire connects two hosts with a link that can be impaired. It returns when
// both interfaces are up and their addresses usable. It needs /dev/net/tun.
func (l *Lab) Wire(a, b End, o WireOptions) (*Wire, error) {
	if o.MTU == 0 {
		o.MTU = defaultMTU
	}
	w := &Wire{}
	var err error
	if w.a, err = a.openTAP(o.MTU); err != nil {
		return nil, err
	}
	if w.b, err = b.openTAP(o.MTU); err != nil {
		w.a.Close()
		return nil, err
	}
	// Write errors are ignored: the interfaces disappear with the lab.
	w.ab = newPipe(o.Impairment, o.Seed, func(f []byte) { w.b.Write(f) })
	w.ba = newPipe(o.Impairment, o.Seed+1, func(f []byte) { w.a.Write(f) })
	w.readers.Add(2)
	go w.read(w.a, w.ab)
	go w.read(w.b, w.ba)
	if !l.own(w) {
		return nil, errClosed
	}
	return w, bringUp(l.ctx, a, b)
}

// Set changes both directions. It does not affect packets already queued.
func (w *Wire) Set(imp Impairment) {
	w.SetAB(imp)
	w.SetBA(imp)
}

// SetAB changes the direction from the first end to the second.
func (w *Wire) SetAB(imp Impairment) { w.ab.set(imp) }

// SetBA changes the direction from the second end to the first.
func (w *Wire) SetBA(imp Impairment) { w.ba.set(imp) }

// Stats returns the counters of the direction from the first end to the second,
// and of the reverse direction.
func (w *Wire) Stats() (ab, ba Stats) { return w.ab.snapshot(), w.ba.snapshot() }

// Close removes the interfaces of both hosts. Lab.Close also does this.
func (w *Wire) Close() error {
	var err error
	w.closing.Do(func() {
		w.ab.close()
		w.ba.close()
		err = errors.Join(w.a.Close(), w.b.Close())
		w.readers.Wait()
	})
	return err
}

// read passes frames from a TAP device to a pipe until the device is closed.
func (w *Wire) read(tap *os.File, p *pipe) {
	defer w.readers.Done()
	buf := make([]byte, 1<<16)
	for {
		n, err := tap.Read(buf)
		if err != nil { // closed, or another program deleted the interface
			return
		}
		p.send(buf[:n])
	}
}

// openTAP makes the end's interface. A TAP device has no offloads, so each read
// is one packet of the link.
func (e End) openTAP(mtu int) (*os.File, error) {
	if err := CheckTUN(); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	tap, err := e.Host.openTUN(e.Name, unix.IFF_TAP)
	if err != nil {
		return nil, err
	}
	if err := e.Host.SetMTU(e.Name, mtu); err != nil {
		tap.Close()
		return nil, err
	}
	return tap, nil
}

// openTUN makes a device that exists until the file is closed. kind is IFF_TUN
// or IFF_TAP.
func (h *Host) openTUN(name string, kind uint16) (*os.File, error) {
	var file *os.File
	err := h.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		req, err := unix.NewIfreq(name)
		if err == nil {
			req.SetUint16(kind | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}
		if err != nil {
			unix.Close(fd)
			return err
		}
		file = os.NewFile(uintptr(fd), name)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: make %s: %w", h.name, name, err)
	}
	return file, nil
}
