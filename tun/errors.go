package tun

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

var (
	// ErrInvalid: an argument or configuration value makes no sense.
	ErrInvalid = errors.New("invalid argument")

	// ErrNameTaken: another network device, of whatever kind, has the name.
	ErrNameTaken = errors.New("name is taken")

	// ErrPermission: the program may not make network devices.
	ErrPermission = errors.New("permission denied")

	// ErrUnsupported: the host has no TUN devices.
	ErrUnsupported = errors.New("the host has no TUN devices")

	// ErrRemoved: the device was deleted by someone else while open.
	ErrRemoved = errors.New("device was removed by another program")

	// errPacket: read dropped a packet.
	errPacket = errors.New("packet dropped")

	// errNoOffload: the kernel does not have what the offload device needs.
	errNoOffload = errors.New("no offload")

	errPacketLen = fmt.Errorf("empty or overlong packet: %w", ErrInvalid)
)

// CheckName reports, with ErrInvalid, why name cannot be the name of a
// device, or pattern for one as in [Config.Name].
func CheckName(name string) error {
	var reason string
	before, after, pattern := strings.Cut(name, "%")
	switch {
	case name == "":
		reason = "is empty"
	case len(name) >= unix.IFNAMSIZ:
		reason = fmt.Sprintf("is longer than %d bytes", unix.IFNAMSIZ-1)
	case name == "." || name == ".." || name == "all" || name == "default":
		reason = "is reserved"
	case strings.ContainsFunc(before+after, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' || r == ':' }):
		reason = "has a character other than printable ASCII without blank, slash and colon"
	case pattern && (!strings.HasPrefix(after, "d") || strings.Contains(after, "%")):
		reason = "has a % that is not one %d"
	default:
		return nil
	}
	return fmt.Errorf("tun: device name %q %s: %w", name, reason, ErrInvalid)
}

// CheckMTU reports, with ErrInvalid, that mtu is not from MinMTU to MaxMTU.
func CheckMTU(mtu int) error {
	if mtu < MinMTU || mtu > MaxMTU {
		return fmt.Errorf("tun: MTU %d is not from %d to %d: %w", mtu, MinMTU, MaxMTU, ErrInvalid)
	}
	return nil
}

// openError turns what the system said when device name was to be made into
// what it means and what to do.
func openError(name string, err error) error {
	var remedy string
	switch {
	case errors.Is(err, unix.EBUSY):
		err = ErrNameTaken
		remedy = fmt.Sprintf("choose another name, or look at the device with `ip -d link show %s` and delete it", name)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		err = fmt.Errorf("%w: %w", ErrPermission, err)
		remedy = "run as root or with CAP_NET_ADMIN, and with access to " + nodePath
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		err = fmt.Errorf("%w: %w", ErrUnsupported, err)
		remedy = "load the driver with `modprobe tun`; a container must be given " + nodePath
	default:
		return fmt.Errorf("tun: open %s: %w", name, err)
	}
	return fmt.Errorf("tun: open %s: %w: %s", name, err, remedy)
}

// readError turns an error of Read into what its caller is promised. When the
// device is deleted, the runtime's poller may notice first and say no more
// than "not pollable": the kernel knows whether the device is there.
func (d *Device) readError(err error) error {
	if d.removed() {
		err = ErrRemoved
	}
	return d.ioError("read from", err)
}

// writeError turns an error of Write into what its caller is promised.
func (d *Device) writeError(err error) error {
	if errors.Is(err, syscall.EIO) {
		err = fmt.Errorf("device is down: %w", err)
	}
	return d.ioError("write to", err)
}

func (d *Device) ioError(what string, err error) error {
	if d.closed.Load() {
		return os.ErrClosed
	}
	if errors.Is(err, os.ErrClosed) || errors.Is(err, syscall.EBADFD) {
		err = ErrRemoved
	}
	return fmt.Errorf("tun: %s device %d: %w", what, d.index, err)
}
