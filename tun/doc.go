// Package tun creates a Linux TUN device and moves IP packets through it.
// Packets that the host routes into the device come out of [Device.Read].
// Packets given to [Device.Write] arrive in the host as if received from a
// network.
//
// # Opening a device
//
// [Open] needs CAP_NET_ADMIN and /dev/net/tun. It creates the device in the
// network namespace of the calling thread, so a program that changes namespaces
// must lock its goroutine to the thread. The new device is down and has no
// addresses or routes; package routing configures it. [Device.Close] removes
// the device, and the kernel removes its addresses and routes with it. The
// kernel does the same if the program is killed.
//
// Errors of Open name the remedy. To react to the kind of failure, match
// [ErrInvalid], [ErrNameTaken], [ErrPermission] or [ErrUnsupported] with
// errors.Is.
//
// # Two kinds of device
//
// An offload device exchanges virtio headers with the kernel, so that one
// system call moves up to 64 KiB of a TCP or UDP flow. Read splits such a large
// packet, and Write coalesces packets of one flow. A plain device moves one
// packet per system call. Both have the same methods. [Config.Offload] requests
// the offload device, and [Device.Offload] reports whether Open could create
// it.
//
// # Moving packets
//
// Read and Write work on batches. Call Read with [Device.BatchSize] buffers,
// each with room for the MTU behind the offset, and one size for each buffer.
// Give Write packets with at least [Headroom] bytes in front of them. If Read
// uses the same offset, its buffers can be given to Write, of this or another
// device.
//
// Read may run in one goroutine and Write in another. Read does not retain
// buffers or write in front of the offset. Write may overwrite buffers up to
// their capacity, because it coalesces in place; its documentation has the
// details.
//
// # Errors while running
//
// Every error of Read is final. Only [os.ErrClosed] and [ErrRemoved] are final
// errors of Write: after any other, such as a malformed packet or a device that
// is down, the caller may continue with the next packets.
//
// Packets can be lost in two places. The kernel drops packets if Read is called
// too rarely ([Device.Overflows]), and Read drops packets that do not fit its
// buffers ([Device.Dropped]).
//
// Tests of a program that uses a device can use package tuntest instead, which
// needs no privileges.
package tun
