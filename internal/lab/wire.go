package lab

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Wire is a link between two hosts that passes through this process, which can
// delay, drop and reorder what goes over it. It carries a few hundred thousand
// packets per second; [Lab.Connect] makes a faster one.
type Wire struct {
	ab, ba  *pipe
	a, b    *os.File // the TAP devices
	readers sync.WaitGroup
	closing sync.Once
}

// WireOptions describes a wire.
type WireOptions struct {
	MTU        int        // of the interfaces, bytes; 0: 1500
	Impairment Impairment // in both directions
	Seed       uint64     // of the random decisions: the same seed and packets, the same decisions
}

// Wire connects two hosts with a link that can be impaired. It returns when the
// interfaces are up and their addresses usable. It needs /dev/net/tun.
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
	// The interfaces go away with the lab: a write that fails is a frame on
	// a cable that nobody listens to.
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

// Set changes both directions from now on. Packets that are under way keep
// their fate.
func (w *Wire) Set(imp Impairment) {
	w.SetAB(imp)
	w.SetBA(imp)
}

// SetAB changes the direction from the first end to the second.
func (w *Wire) SetAB(imp Impairment) { w.ab.set(imp) }

// SetBA changes the direction from the second end to the first.
func (w *Wire) SetBA(imp Impairment) { w.ba.set(imp) }

// Stats returns the counters of the direction from the first end to the
// second, and of the other one.
func (w *Wire) Stats() (ab, ba Stats) { return w.ab.snapshot(), w.ba.snapshot() }

// Close removes the interfaces of both hosts. The lab does it too.
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
		if err != nil { // closed, or somebody deleted the interface
			return
		}
		p.send(buf[:n])
	}
}

// openTAP makes the end's interface. A TAP device has no offloads, so each
// read is one packet as it would be on a cable.
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

// openTUN makes a device that lives until the file is closed; kind is IFF_TUN
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
