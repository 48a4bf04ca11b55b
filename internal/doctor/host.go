package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"masquevpn/internal/privilege"
)

// NetAdmin checks for CAP_NET_ADMIN. capabilities are all that the program
// needs to run without sudo.
func (c *Report) NetAdmin(capabilities string) {
	switch ok, err := privilege.HasNetAdmin(); {
	case err != nil:
		c.Warn(fmt.Sprintf("privileges: not known: %v", err), "")
	case !ok:
		c.Fail("privileges: CAP_NET_ADMIN is missing", privilege.Remedy(capabilities))
	default:
		c.OK("privileges: CAP_NET_ADMIN")
	}
}

// TUN checks that TUN devices can be created, and that they support offload if
// the configuration enables it.
func (c *Report) TUN(offload bool) {
	const path = "/dev/net/tun"
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		defer f.Close()
		features, err := unix.IoctlGetInt(int(f.Fd()), unix.TUNGETFEATURES)
		if offload && err == nil && features&unix.IFF_VNET_HDR == 0 {
			c.Warn("TUN: the kernel's driver has no offload",
				"it works, more slowly; Linux 2.6.32 and later have it")
			return
		}
		c.OK("TUN: %s opens", path)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV):
		c.Fail("TUN: "+path+" does not exist",
			"sudo modprobe tun; in a container, pass the device in")
	default:
		c.Fail("TUN: "+err.Error(), "give this user access to "+path)
	}
}

// Interface checks that the name of the TUN interface is free. A name with %d
// always is: the kernel chooses the number.
func (c *Report) Interface(name string) {
	if strings.Contains(name, "%d") {
		return
	}
	if _, err := net.InterfaceByName(name); err == nil {
		c.Fail(fmt.Sprintf("interface: %s exists already", name),
			"set tun.name to another name, or stop what made it")
		return
	}
	c.OK("interface: %s is free", name)
}

// RunDir checks that the run directory can be written to or created.
func (c *Report) RunDir(dir string) {
	c.Writable("run directory", dir, "run with sudo, or choose another one with --run-dir")
}

// Writable checks that a folder can be written to or created, and that its file
// system has space.
func (c *Report) Writable(what, dir, remedy string) {
	existing := dir
	for {
		if _, err := os.Stat(existing); !errors.Is(err, fs.ErrNotExist) ||
			existing == filepath.Dir(existing) {
			break
		}
		existing = filepath.Dir(existing)
	}
	if err := unix.Access(existing, unix.W_OK|unix.X_OK); err != nil {
		c.Fail(fmt.Sprintf("%s: %s: %v", what, existing, err), remedy)
		return
	}
	var st unix.Statfs_t
	if err := unix.Statfs(existing, &st); err == nil && st.Blocks > 0 && st.Bavail == 0 {
		c.Fail(fmt.Sprintf("%s: %s: no space is left", what, existing), "make room there (df -h)")
		return
	}
	c.OK("%s: %s", what, dir)
}

// wantBuffer is the size in bytes of the socket buffers that quic-go requests.
const wantBuffer = 7 << 20

// UDPBuffer checks that UDP sockets get buffers of the size that quic-go
// requests. Packets beyond the buffer are lost under load.
func (c *Report) UDPBuffer() {
	receive, receiveErr := udpBuffer(unix.SO_RCVBUF, unix.SO_RCVBUFFORCE)
	send, sendErr := udpBuffer(unix.SO_SNDBUF, unix.SO_SNDBUFFORCE)
	what := fmt.Sprintf("UDP buffers: %d KiB to receive, %d KiB to send", receive>>10, send>>10)
	switch err := errors.Join(receiveErr, sendErr); {
	case err != nil:
		c.Warn(fmt.Sprintf("UDP buffers: not known: %v", err), "")
	case min(receive, send) < wantBuffer:
		c.Warn(what, fmt.Sprintf("packets may be lost under load; sudo sysctl -w net.core.rmem_max=%d net.core.wmem_max=%d", wantBuffer, wantBuffer))
	default:
		c.OK("%s", what)
	}
}

// udpBuffer requests a buffer as quic-go does and returns its size in bytes.
func udpBuffer(option, force int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, wantBuffer) != nil {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, wantBuffer); err != nil {
			return 0, err
		}
	}
	doubled, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, option)
	return doubled / 2, err // the kernel doubles the value (socket(7))
}
