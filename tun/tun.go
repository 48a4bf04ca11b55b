package tun

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// Headroom is the number of bytes that callers of Write leave free in front
	// of each packet. Write builds the virtio header there.
	Headroom = 16

	// MaxPacketLen is the length in bytes of the longest IP packet.
	MaxPacketLen = 65535

	// MinMTU and MaxMTU bound the MTU of a device, in bytes. If the MTU is less
	// than 1280, the kernel removes the device's IPv6 addresses (RFC 8200
	// section 5).
	MinMTU = 68
	MaxMTU = MaxPacketLen

	// DefaultMTU is the MTU in bytes if Config.MTU is 0. It is the minimum link
	// MTU of IPv6 (RFC 8200 section 5).
	DefaultMTU = 1280

	// DefaultName is the name of the device if Config.Name is empty.
	DefaultName = "masque%d"
)

// Config describes the device that Open creates. The zero value is valid.
type Config struct {
	// Name is the name of the device, at most 15 bytes. The kernel replaces
	// one %d by the lowest free number. Empty means DefaultName.
	Name string

	// MTU is in bytes, from MinMTU to MaxMTU. 0 means DefaultMTU.
	MTU int

	// Offload requests the offload device. If the kernel does not support it,
	// Open creates the plain device and logs the reason.
	Offload bool

	// Logger receives one line if Open falls back to the plain device. nil
	// means that nothing is logged.
	Logger *slog.Logger
}

// withDefaults returns cfg with defaults for empty fields, and checks it.
func (cfg Config) withDefaults() (Config, error) {
	if cfg.Name == "" {
		cfg.Name = DefaultName
	}
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := CheckName(cfg.Name); err != nil {
		return cfg, err
	}
	return cfg, CheckMTU(cfg.MTU)
}

// backend is implemented by the offload device and the plain device. read and
// write follow [Device.Read] and [Device.Write], except that read returns
// errPacket after it dropped a packet. The n packets it returns with errPacket
// are valid.
type backend interface {
	read(bufs [][]byte, sizes []int, offset int) (n int, err error)
	write(bufs [][]byte, offset int) (n int, err error)
	close() error
}

// Device is a TUN device. Its methods may be called concurrently.
//
// Device identifies the interface by its index, so other programs may rename it
// while it is in use.
type Device struct {
	backend   backend
	offload   bool
	batchSize int
	index     int

	dropped atomic.Uint64
	closed  atomic.Bool

	mu sync.Mutex // guards the fields below

	// nl works in the network namespace of Open. It is nil once closed.
	nl *netlink.Handle

	// name, mtu and overflows are the values last seen by refresh.
	name      string
	mtu       int
	overflows uint64
}

// Open creates a device in the network namespace of the calling thread. It
// never attaches to an existing device.
//
// The error matches ErrInvalid if cfg is invalid, ErrNameTaken if an interface
// of any kind has the name, ErrPermission if CAP_NET_ADMIN is missing, and
// ErrUnsupported if the host has no /dev/net/tun. Its text names the remedy.
func Open(cfg Config) (*Device, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("tun: open %s: netlink socket: %w", cfg.Name, err)
	}
	d, err := open(cfg, nl)
	if err != nil {
		nl.Close()
		return nil, err
	}
	return d, nil
}

func open(cfg Config, nl *netlink.Handle) (*Device, error) {
	d := &Device{nl: nl, mtu: cfg.MTU}
	queueLen := plainQueueLen
	if cfg.Offload {
		dev, name, err := openOffload(cfg.Name)
		switch {
		case err == nil:
			d.backend, d.name, d.offload, d.batchSize = dev, name, true, dev.batchSize()
			queueLen = offloadQueueLen
		case errors.Is(err, errNoOffload):
			cfg.Logger.Warn("tun: using the plain device, which is slower", "interface", cfg.Name,
				"reason", err)
		default:
			return nil, openError(cfg.Name, err)
		}
	}
	if d.backend == nil {
		dev, name, err := openPlain(cfg.Name)
		if err != nil {
			return nil, openError(cfg.Name, err)
		}
		d.backend, d.name, d.batchSize = dev, name, 1
	}
	if err := d.configure(queueLen); err != nil {
		d.backend.close()
		return nil, fmt.Errorf("tun: open %s: %w", d.name, err)
	}
	return d, nil
}

// configure looks up the index of the new device and sets its queue length and
// MTU.
func (d *Device) configure(queueLen int) error {
	link, err := d.nl.LinkByName(d.name)
	if err != nil {
		return fmt.Errorf("find the new device: %w", err)
	}
	d.index = link.Attrs().Index
	if err := d.nl.LinkSetTxQLen(link, queueLen); err != nil {
		return fmt.Errorf("set queue length %d: %w", queueLen, err)
	}
	if err := d.nl.LinkSetMTU(link, d.mtu); err != nil {
		return fmt.Errorf("set MTU %d: %w", d.mtu, err)
	}
	return nil
}

// refresh updates name, mtu and overflows from the kernel. They keep the values
// last seen if the device is closed or removed. d.mu is held.
func (d *Device) refresh() {
	if d.nl == nil {
		return
	}
	if link, err := d.nl.LinkByIndex(d.index); err == nil {
		d.name, d.mtu = link.Attrs().Name, link.Attrs().MTU
		if stats := link.Attrs().Statistics; stats != nil {
			d.overflows = max(d.overflows, stats.TxDropped)
		}
	}
}

// removed reports whether the interface of the open device no longer exists.
func (d *Device) removed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.nl == nil {
		return false
	}
	_, err := d.nl.LinkByIndex(d.index)
	_, notFound := errors.AsType[netlink.LinkNotFoundError](err)
	return notFound
}

// Name returns the name of the device. It asks the kernel, because other
// programs may rename the device, so it is too slow to call for each packet.
// After Close it returns the last name seen.
func (d *Device) Name() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	return d.name
}

// Index returns the interface index, which never changes.
func (d *Device) Index() int { return d.index }

// MTU returns the MTU in bytes. Like Name, it asks the kernel.
func (d *Device) MTU() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	return d.mtu
}

// Overflows returns the number of packets that the kernel dropped because the
// queue in front of Read was full. A large packet that Read would have split
// counts once. Like Name, Overflows asks the kernel.
func (d *Device) Overflows() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	return d.overflows
}

// SetMTU changes the MTU, in bytes. It may be called during Read and Write. The
// error matches ErrInvalid if mtu is not from MinMTU to MaxMTU, and
// os.ErrClosed after Close.
func (d *Device) SetMTU(mtu int) error {
	if err := CheckMTU(mtu); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.nl == nil {
		return os.ErrClosed
	}
	link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Index: d.index}}
	if err := d.nl.LinkSetMTU(link, mtu); err != nil {
		if errors.Is(err, syscall.ENODEV) {
			err = ErrRemoved
		}
		return fmt.Errorf("tun: set MTU %d on %s: %w", mtu, d.name, err)
	}
	d.mtu = mtu
	return nil
}

// Offload reports whether d is an offload device.
func (d *Device) Offload() bool { return d.offload }

// BatchSize returns the number of buffers that callers should give Read, which
// is the most packets it returns at once. Write takes any number.
func (d *Device) BatchSize() int { return d.batchSize }

// Dropped returns the number of packets that Read dropped because they were
// malformed or did not fit the buffers. A large packet that Read splits counts
// once.
func (d *Device) Dropped() uint64 { return d.dropped.Load() }

// Read waits for packets from the host and returns their number n, at least 1.
// Packet i is bufs[i][offset:offset+sizes[i]]. sizes must be at least as long
// as bufs. Read does not retain the buffers. It may overwrite their contents
// behind the packets, but not in front of offset.
//
// Buffers should have room for MTU bytes after offset. Longer packets still
// arrive if another program raised the MTU, or if they were queued before the
// MTU was lowered. Read drops packets that are longer than a buffer, or more
// than len(bufs), and counts them in Dropped. With fewer buffers than BatchSize
// it may drop ordinary TCP traffic.
//
// Every error is final. It matches os.ErrClosed after Close, which also ends a
// waiting Read, and ErrRemoved after another program deleted the device.
func (d *Device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	if len(bufs) == 0 || len(sizes) < len(bufs) {
		return 0, fmt.Errorf("tun: read: %d buffers, %d sizes: %w", len(bufs), len(sizes),
			ErrInvalid)
	}
	for _, b := range bufs {
		if offset < 0 || offset >= len(b) {
			return 0, fmt.Errorf("tun: read: offset %d in a buffer of %d bytes: %w", offset, len(b),
				ErrInvalid)
		}
	}
	for {
		n, err := d.backend.read(bufs, sizes, offset)
		if err != nil {
			if err != errPacket {
				return 0, d.readError(err)
			}
			d.dropped.Add(1)
		}
		if n > 0 {
			return n, nil
		}
	}
}

// Write gives packets to the host. Packet i is bufs[i][offset:]; offset is at
// least Headroom. Write tries every packet, even after the host refused one. It
// returns the number of packets that the host accepted and, if that is not all
// of them, the first error. The error matches syscall.EIO while the device is
// down, syscall.EINVAL if a buffer holds no IP packet, and ErrInvalid if a
// packet is empty or longer than MaxPacketLen. Only os.ErrClosed and ErrRemoved
// are final.
//
// During the call Write may overwrite each buffer from offset-Headroom up to
// its capacity, because it coalesces packets of one flow by appending them to
// the first. So buffers must not share that memory. If several packets lie in
// one array, limit their capacity with a full slice expression, b[:n:n]; Write
// then appends nothing to them. It coalesces best in buffers with a capacity of
// offset+MaxPacketLen. After Write, the contents of the buffers are undefined;
// bufs itself is unchanged. Write does not retain the buffers.
func (d *Device) Write(bufs [][]byte, offset int) (int, error) {
	if offset < Headroom {
		return 0, fmt.Errorf("tun: write: offset %d is less than Headroom, %d: %w", offset,
			Headroom, ErrInvalid)
	}
	n, err := d.backend.write(bufs, offset)
	if err != nil {
		err = d.writeError(err)
	}
	return n, err
}

// Close removes the device from the host and ends a waiting Read. It may be
// called more than once.
func (d *Device) Close() error {
	d.closed.Store(true)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.nl == nil {
		return nil
	}
	d.refresh()
	d.nl.Close()
	d.nl = nil
	if err := d.backend.close(); err != nil {
		return fmt.Errorf("tun: close %s: %w", d.name, err)
	}
	return nil
}
