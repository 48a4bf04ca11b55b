package connectip

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"masquevpn/tun"
)

// Only stages that no peer can delay count as stuck. The error names the stage
// for which the others wait.
func TestStuck(t *testing.T) {
	for _, tc := range []struct {
		name   string
		stages []Stage
		age    time.Duration
		want   string // part of the error; empty: no error
	}{
		{"short wait", []Stage{StageDeviceWrite, StageInbox}, StuckAfter, ""},
		{"peer accepts nothing", []Stage{StageFlowQueue, StageSender}, time.Hour, ""},
		{"device", []Stage{StageDeviceWrite, StageInbox, StageQUICReceive}, time.Minute,
			"device_write has waited for 1m0s"},
		{"inbox", []Stage{StageInbox, StageQUICReceive}, time.Minute, "inbox"},
		{"QUIC", []Stage{StageQUICReceive}, time.Minute, "quic_receive"},
		{"device reader", []Stage{StageDeviceRead, StageFlowQueue}, time.Minute,
			"device_read"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var a Ages
			for _, s := range tc.stages {
				a.Note(s, tc.age)
			}
			switch err := a.Stuck(); {
			case tc.want == "" && err != nil:
				t.Errorf("got %v, want nothing", err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("got %v, want %q in it", err, tc.want)
			}
		})
	}
}

// blockedDevice is a device whose Write waits until the channel is closed.
type blockedDevice chan struct{}

func (blockedDevice) BatchSize() int { return maxBatch }

func (d blockedDevice) Write(bufs [][]byte, _ int) (int, error) {
	<-d
	return len(bufs), nil
}

// The age of a waiting packet counts in its stage, however the packet reaches
// the device.
func TestAges(t *testing.T) {
	datagram := append([]byte{contextIPPacket},
		echoPacket(clientAddr4, target4, 64, 100)[tun.Headroom:]...)
	for _, tc := range []struct {
		name    string
		receive func(*Conn, *inbox)
		want    []Stage
	}{
		{"written by flush", func(_ *Conn, in *inbox) {
			in.HandleDatagram(datagram)
			in.FlushDatagrams()
		}, []Stage{StageInbox, StageDeviceWrite}},
		{"written by deliver", func(_ *Conn, in *inbox) {
			for range maxInline + 1 {
				in.HandleDatagram(datagram)
			}
			in.FlushDatagrams()
		}, []Stage{StageDeviceWrite}},
		{"not flushed", func(_ *Conn, in *inbox) {
			in.HandleDatagram(datagram)
		}, []Stage{StageInbox}},
		{"received from the stream", func(c *Conn, _ *inbox) {
			c.handleDatagram(datagram, unbatched{c, &c.writers.stream})
		}, []Stage{StageDeviceWrite}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, _ := receiver(t)
				device := make(blockedDevice)
				c.cfg.Device = device
				in := newInbox(c)
				go in.deliver()
				go tc.receive(c, in)
				time.Sleep(time.Minute)
				var a, want Ages
				c.AddAges(&a)
				for _, s := range tc.want {
					want.Note(s, time.Minute)
				}
				for i := range a {
					a[i] = a[i].Round(time.Second)
				}
				if a != want {
					t.Errorf("got ages %v, want %v", a.Milliseconds(), want.Milliseconds())
				}
				close(device)
				in.FlushDatagrams()
				synctest.Wait()
				a = Ages{}
				c.AddAges(&a)
				if a != (Ages{}) {
					t.Errorf("ages %v after all packets were written", a.Milliseconds())
				}
				c.stop(nil)
			})
		})
	}
}
