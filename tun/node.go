package tun

import (
	"fmt"

	"golang.org/x/sys/unix"
)

const nodePath = "/dev/net/tun"

// openNode opens /dev/net/tun in non-blocking mode. The caller closes it.
func openNode() (fd int, err error) {
	fd, err = unix.Open(nodePath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", nodePath, err)
	}
	return fd, nil
}

// createDevice creates a device with the open node fd and returns its name.
// Because of IFF_TUN_EXCL the error is EBUSY if any device has the name.
// Without this flag the kernel would attach fd to a persistent TUN device.
func createDevice(fd int, name string, flags uint16) (string, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return "", err
	}
	ifr.SetUint16(flags | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return "", fmt.Errorf("TUNSETIFF: %w", err)
	}
	return ifr.Name(), nil
}
