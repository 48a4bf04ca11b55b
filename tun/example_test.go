package tun_test

import (
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"

	"masquevpn/tun"
)

// A VPN client opens its device, and prints the reason if it cannot.
func ExampleOpen() {
	dev, err := tun.Open(tun.Config{
		Name:    "masque%d", // masque0, or the next free number
		MTU:     1400,
		Offload: true,
		Logger:  slog.Default(),
	})
	if errors.Is(err, tun.ErrPermission) {
		log.Fatal("not allowed to create a network device: ", err)
	}
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Close()

	fmt.Println("configure addresses and routes of interface", dev.Index())
}

// A program checks names from its configuration before it creates devices.
func ExampleCheckName() {
	fmt.Println(tun.CheckName("masque%d"))
	fmt.Println(tun.CheckName("default"))
	// Output:
	// <nil>
	// tun: device name "default" is reserved: invalid argument
}

// sendToTunnel and receiveFromTunnel stand for the program's tunnel.
func sendToTunnel(packet []byte)         {}
func receiveFromTunnel(b []byte) (n int) { return len(b) }

// One goroutine moves packets from the host into the tunnel until another
// goroutine closes the device.
func ExampleDevice_Read() {
	dev, err := tun.Open(tun.Config{Offload: true})
	if err != nil {
		log.Fatal(err)
	}
	bufs := make([][]byte, dev.BatchSize())
	sizes := make([]int, len(bufs))
	for i := range bufs {
		bufs[i] = make([]byte, tun.Headroom+tun.MaxPacketLen)
	}
	for {
		n, err := dev.Read(bufs, sizes, tun.Headroom)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			log.Fatal(err)
		}
		for i := range n {
			sendToTunnel(bufs[i][tun.Headroom:][:sizes[i]])
		}
	}
}

// One goroutine gives packets from the tunnel to the host. It continues if the
// host refuses a packet.
func ExampleDevice_Write() {
	dev, err := tun.Open(tun.Config{Offload: true})
	if err != nil {
		log.Fatal(err)
	}
	buf := make([]byte, tun.Headroom+tun.MaxPacketLen)
	for {
		n := receiveFromTunnel(buf[tun.Headroom:])
		packets := [][]byte{buf[:tun.Headroom+n]}
		_, err := dev.Write(packets, tun.Headroom)
		if errors.Is(err, os.ErrClosed) || errors.Is(err, tun.ErrRemoved) {
			return
		}
		if err != nil {
			slog.Debug("packet dropped", "error", err)
		}
	}
}
